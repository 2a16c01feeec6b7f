"""The light part that ships in an app: open a bundle, feed it, let it speak."""

from .chat import Chat
from .generate import Generation, Token
from .sampling import Sampling
from .session import Model, open_bundle
from .state import State

__all__ = ["Chat", "Generation", "Model", "Sampling", "State", "Token", "open_bundle"]
