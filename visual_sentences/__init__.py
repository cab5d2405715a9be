"""Visual sentences: images, pairs and videos as rows of codes, on disk and on the way to a model.

A visual sentence is 1 to `images_per_row` images of `codes_per_image` codes each. Submodules are
imported by name (`from visual_sentences.batch import Batch`), so that a model which needs only the
value types loads no image or Arrow library.
"""
