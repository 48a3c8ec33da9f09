"""The words of cards and pages in both languages: one rendering a term, so that a reader meets one word for one thing."""

import re

TERMS = {
    "self-supervised": "自己教師あり",
    "stop-gradient": "勾配停止",
    "label noise": "ラベルノイズ",
    "label error": "ラベル誤り",
    "data augmentation": "データ拡張",
    "throughput": "スループット",
    "fine-tuning": "ファインチューニング",
    "token": "トークン",
    "semantic segmentation": "セマンティックセグメンテーション",
    "positional encoding": "位置符号",
    "convolution": "畳み込み",
    "compound scaling": "複合スケーリング",
    "generalisation": "汎化",
    "offline reinforcement learning": "オフライン強化学習",
    "behaviour cloning": "行動クローニング",
    "Hessian": "ヘッセ行列",
    "loss landscape": "損失地形",
    "grid search": "グリッドサーチ",
    "cross-validation": "交差検証",
    "temperature": "温度",
}
"""English term → the Japanese rendering that stands in the same field of the card."""

LABELS = {
    "en": {
        "reproduced": "reproduced",
        "direction only": "direction only",
        "not reproduced": "not reproduced",
        "inconclusive": "inconclusive",
        "not comparable": "not comparable",
        "not run": "not run",
        "stale": "stale",
        "paper": "paper",
        "claim": "claim",
        "quantity": "quantity",
        "reported": "reported",
        "published": "published",
        "measured": "measured",
        "yours": "yours",
        "verdict": "verdict",
        "rung": "rung",
        "domain": "domain",
        "scale": "scale",
        "seeds": "seeds",
        "traps": "Known traps",
        "purpose": "Purpose",
        "method": "Method",
        "result": "Result",
        "limits": "Limits",
        "title": "title",
    },
    "ja": {
        "reproduced": "再現した",
        "direction only": "方向のみ再現",
        "not reproduced": "再現せず",
        "inconclusive": "判定できず",
        "not comparable": "比較対象外",
        "not run": "未実行",
        "stale": "要再測定",
        "paper": "論文",
        "claim": "主張",
        "quantity": "量",
        "reported": "論文の値",
        "published": "公開済みの測定",
        "measured": "測定値",
        "yours": "手元の測定",
        "verdict": "判定",
        "rung": "段",
        "domain": "分野",
        "scale": "規模",
        "seeds": "シード数",
        "traps": "つまずきやすい点",
        "purpose": "目的",
        "method": "方法",
        "result": "結果",
        "limits": "限界",
        "title": "題名",
    },
}

RUNGS = {
    "en": ("nothing yet", "numbers", "parity", "laptop", "real", "full"),
    "ja": ("未着手", "数値一致", "実装一致", "手元で測定", "実データで測定", "論文規模で測定"),
}


def label(word: str, lang: str) -> str:
    """The word as a reader of ``lang`` sees it."""
    return LABELS[lang].get(word, word)


def missing_renderings(en: str, ja: str) -> list[str]:
    """Glossary terms that stand in ``en`` while their rendering is missing from ``ja``."""
    missing = []
    for term, rendering in TERMS.items():
        if re.search(rf"\b{re.escape(term)}(s|es)?\b", en, flags=re.IGNORECASE) and rendering not in ja:
            missing.append(f"{term} ({rendering})")
    return missing


def numbers_in(text: str) -> list[str]:
    """The numbers of a text, sorted, thousands separators dropped: both languages of a field carry the same."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    return sorted(re.findall(r"(?<![A-Za-z\d.])\d+(?:\.\d+)?", text))
