"""The LLaMA family as pure functions on a pytree of parameters.

Every axis name that a shape annotation of this package uses, declared once:

| name | meaning |
|---|---|
| `batch` | requests that share one launch, each in its slot |
| `seq` | consecutive tokens of one launch: the chunk in prefill, 1 in decode |
| `selected` | of `seq`, the tokens whose hidden states are wanted |
| `vocab` | rows of the embedding and of the head |
| `hidden` | width of the residual stream |
| `ffn` | width between gate/up and down |
| `heads` | query heads |
| `kv_heads` | key and value heads; `heads` is a multiple of it |
| `head_dim` | width of one head |
| `heads_dim` | `heads * head_dim`: the output of q, the input of o |
| `kv_heads_dim` | `kv_heads * head_dim`: the output of k and of v |
| `pages` | physical pages of the KV cache; page 0 takes the writes of padding |
| `page_size` | token positions in a page |
| `table` | entries in one request's page table |
| `out`, `in` | rows and columns of a weight matrix: `y = x @ W.T` |
"""
