"""Regularization cocktails: which of thirteen regularisers a plain network on a table takes, searched for each table."""

from saigen.papers.tabular.regularization_cocktails.estimator import (
    CocktailClassifier,
    balanced_class_weights,
    cocktail_network,
    cosine_rate,
    cycle_ends,
    mean_probabilities,
    train_cocktail,
)
from saigen.papers.tabular.regularization_cocktails.model import (
    CocktailMLP,
    dropout_rates,
    shake_drop,
    shake_shake,
)
from saigen.papers.tabular.regularization_cocktails.search import (
    CocktailSearch,
    balanced_accuracy,
    balanced_accuracy_then_log_loss,
    search_cocktail,
)
from saigen.papers.tabular.regularization_cocktails.space import (
    INGREDIENTS,
    SPACE,
    Cocktail,
    Parameter,
    sample,
    single,
    trials_of,
)
from saigen.papers.tabular.regularization_cocktails.transform import (
    Mixed,
    fgsm,
    mixed_loss,
    row_cutmix,
    row_cutout,
    row_mixup,
)

__all__ = [
    "Cocktail",
    "CocktailClassifier",
    "CocktailMLP",
    "CocktailSearch",
    "INGREDIENTS",
    "Mixed",
    "Parameter",
    "SPACE",
    "balanced_accuracy",
    "balanced_accuracy_then_log_loss",
    "balanced_class_weights",
    "cocktail_network",
    "cosine_rate",
    "cycle_ends",
    "dropout_rates",
    "fgsm",
    "mean_probabilities",
    "mixed_loss",
    "row_cutmix",
    "row_cutout",
    "row_mixup",
    "sample",
    "search_cocktail",
    "shake_drop",
    "shake_shake",
    "single",
    "train_cocktail",
    "trials_of",
]
