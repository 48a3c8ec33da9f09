from hello_papers.analysis.mean_of_noise.layer import Mean, mean_net

__all__ = ["Mean", "mean_net"]
