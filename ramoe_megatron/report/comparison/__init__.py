"""Methods compared over seeds and base models: comparison.json, its page, plots and Markdown document."""
