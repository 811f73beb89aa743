"""Results as people read them: on the terminal, as Markdown, as one HTML file."""
