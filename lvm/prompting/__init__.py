"""Prompts from files and commands: what is asked, read, answered and written."""
