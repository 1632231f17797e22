"""Random encoders of two layers that label texts."""

import transformers as hf

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**SMALL, "vocab_size": 99, "max_position_embeddings": 40, "num_labels": 3}
LABELS = {"id2label": {0: "POSITIVE", 1: "NEGATIVE", 2: "NEUTRAL"}}
DISTIL = {"vocab_size": 99, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40}

CLASSIFIERS = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, **LABELS)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**BERT, **LABELS, pad_token_id=0)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL, num_labels=3, **LABELS)),
    "albert": lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**BERT, **LABELS, embedding_size=16)),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**BERT, **LABELS, pad_token_id=0, global_attn_every_n_layers=2, local_attention=4)
    ),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**BERT, **LABELS)),
}
