"""The experiments of the two papers: what each runs, how it becomes small, and the page that shows them."""
