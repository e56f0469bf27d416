"""GenEval (arXiv 2310.11513): whether generated images show the objects, counts, colours and places of their prompts.

`prompts` reads the benchmark's list, in the words of `vocabulary`; `layout` keeps the images as the published tools
do; `detector` finds objects and `colours` names their colour, each with a network; `rules` judges one image by them;
`results` scores all images and compares two sets. A figure depends on the detector, whose name belongs beside it.
"""
