"""Tables, pages and figures, whatever they show."""
