"""Which number goes where?"""
