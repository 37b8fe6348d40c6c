"""Built-in tasks: trained models with their data, so that every command works from the first minute."""
