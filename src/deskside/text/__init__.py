"""Text in, text out: tokenizer, streaming decode, stop strings, chat templates."""
