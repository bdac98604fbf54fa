"""`s2q ui`: a page in the browser that shows a prompt by two models side by side, from the same noise."""
