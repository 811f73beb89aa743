"""The CARE Transformer in PyTorch: model, exact inference form, training and evaluation.

Importing `care.networks` registers care_s0, care_s1, care_s2, care_tiny and mlla_t with timm. This
package itself imports nothing: who opens a dataset or looks at an archive loads no PyTorch for it.
"""
