"""A local web page to prompt a model: `python -m lvm.playground MODEL --tokenizer TOK`.

One process: an event loop that talks to browsers (`server`), one thread that has the model
(`jobs`, `answers`), pictures and prompts by their SHA-256 in a folder of bounded size (`store`).
"""
