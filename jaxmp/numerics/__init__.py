"""What can a number hold?"""
