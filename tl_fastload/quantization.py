"""What pickles of whole models from before formats were modules name; use
`tl_fastload.quantized.spec`.
"""

from tl_fastload.quantized.formats.bitsandbytes import BitsAndBytesSpec as Quantization

__all__ = ["Quantization"]
