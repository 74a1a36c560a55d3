"""Forward proportion and combinatorial recruitment: do heads rewire, and is the present state all that counts?"""
