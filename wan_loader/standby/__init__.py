"""Ready processes: a server that has imported what programs need, and forks one for each that is started.

place       where the server of this user and this environment listens
wire        what the two say to each other: documents, with descriptors
world       what a process gets from whoever starts it, taken from one and given to another
variables   which variables of the environment imports have looked at
learned     what programs have imported, so that the server imports it the next time
imports     imports modules, and finds out whether a process may be forked then
prepared    what the server knows once it has imported everything
refusals    why a program is started directly
server      listens, and forks
watcher     watches over a program that was forked
program     becomes the program, and runs it
ending      ends it
client      hands a program over, and stands for it until it has ended
control     starts, describes and ends the server
"""
