"""What the examples share: settings, command line, training loop, tables, figures, code files."""
