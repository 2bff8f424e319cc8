"""The pages, a module each: layout only."""
