"""What a step is: artifacts, keys, the log and the lock of a results' folder.

Imports core only; knows neither the configuration nor the network, which it sees by a protocol.
A newcomer changes here what "up to date" and "undamaged" mean.
"""
