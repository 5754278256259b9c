"""Many methods over seeds and base models: comparison.json, its page, its plots and its Markdown document."""
