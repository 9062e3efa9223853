"""Which layers keep it bounded?"""
