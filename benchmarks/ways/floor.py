"""The bare floor: a Keras loop over the same images with the same limits, and no federation.

python floor.py ROUNDS BATCH
"""

import os
import sys

import journal
import shard


def main() -> None:
    """A round is an evaluation on the test split and an epoch, as on a device."""
    rounds, batch = map(int, sys.argv[1:3])
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(int(os.environ["OMP_NUM_THREADS"]))
    tf.config.threading.set_inter_op_parallelism_threads(1)
    train, test = shard.load("train"), shard.load("test")
    model = shard.build_model(jit_compile=False)  # with it an epoch takes three times as long
    for number in range(1, rounds + 1):
        journal.tell("round", round=number)
        model.evaluate(*test, batch_size=batch, verbose=0)
        model.fit(*train, batch_size=batch, verbose=0)
    journal.tell("end")


if __name__ == "__main__":
    main()
