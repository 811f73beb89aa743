"""Mutation testing: small changes of the product, and the tests that should notice them."""
