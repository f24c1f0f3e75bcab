"""The folder of a run: who may write there, what an earlier run left, what may change."""
