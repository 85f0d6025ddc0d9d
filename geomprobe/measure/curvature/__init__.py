"""The Hessian-gradient product Hg, exactly, and what else needs a second derivative."""
