from lightning_meta.learnets.layers import FactorisedConv2d, FactorisedLinear, depthwise_conv2d

__all__ = ["FactorisedConv2d", "FactorisedLinear", "depthwise_conv2d"]
