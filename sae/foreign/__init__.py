"""Autoencoders as other programs store them: one file a format, each with `read` and `write`.

A format is a config, which may be None, and tensors by name. Encodings are equal on both sides but for the rounding of
float32; what one side can't express is an AutoencoderError in one line.
"""

from sae.foreign import openai, saelens, sparsify
from sae.foreign.common import About, Foreign, Format

__all__ = ["FORMATS", "About", "Foreign", "Format"]

FORMATS: dict[str, Format] = {one.name: one for one in (saelens.FORMAT, sparsify.FORMAT, openai.FORMAT)}
