from lightning_meta.learned_optimizers.optimizer import LearnedOptimizer

__all__ = ["LearnedOptimizer"]
