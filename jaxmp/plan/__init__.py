"""Will it fit hardware we lack?"""
