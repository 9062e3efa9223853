"""Where was range lost?"""
