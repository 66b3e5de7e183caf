"""BatchNorm networks under torch.func, and the model comes back as it was."""

__version__ = "0.1.0"
