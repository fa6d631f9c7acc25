"""The native engine: any contiguous range of layers of any Hugging Face rotary decoder."""
