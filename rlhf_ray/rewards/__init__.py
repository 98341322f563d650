"""What gives rewards: reward models and ensembles, functions, a language model as judge, services over HTTP.

Each is a `Source`. What a source cannot give is None, never a number: whoever asks decides what becomes of a rollout
without a reward.
"""
