"""A store that several machines share: what one built, the others take, by content.

Imports the ground floor and steps. Objects lie under the SHA-256 of their content; a step's key
leads to the manifest of the artifact that it makes.
A newcomer changes here where a store may lie, and what happens when it fails.
"""
