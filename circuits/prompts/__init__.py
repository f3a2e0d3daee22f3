"""Prompt files of every format to tokens, answers, spans and templates."""
