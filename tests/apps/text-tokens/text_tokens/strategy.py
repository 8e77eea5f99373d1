"""text-tokens: a strategy that knows how often each client has seen each word."""

from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg


class TokenFedAvg(FedAvg):
    """FedAvg whose embeddings are weighted by the clients' counts of the words.

    With FedAvg, a client that has never seen a word pulls the word's embedding back to where it
    was. A reply has the model in `arrays` and the counts, of shape (words,), in `counts`.
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the mean model and the mean metrics of the replies without an error."""
        contents = [reply.content for reply in replies if reply.has_content()]
        print(f"round {server_round}: {len(contents)} models")
        if not contents:
            return None, None
        examples = np.array([content["metrics"]["num-examples"] for content in contents])
        # The small summand leaves an embedding where it was if no client has seen its word.
        counts = np.stack([content["counts"]["tokens"].numpy() + 1e-9 for content in contents])

        arrays = ArrayRecord()
        for name in contents[0]["arrays"]:
            models = np.stack([content["arrays"][name].numpy() for content in contents])
            # (clients, words, 1) for the embeddings; (clients, 1, ...) for the other arrays.
            weights = counts[..., np.newaxis] if name == "embeddings" else examples
            weights = weights.reshape(weights.shape + (1,) * (models.ndim - weights.ndim))
            mean = np.sum(models * weights, axis=0) / weights.sum(axis=0)
            arrays[name] = Array(mean.astype(np.float32))
        return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)
