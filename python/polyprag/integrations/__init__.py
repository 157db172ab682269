"""polyprag inside of other libraries; each module needs its library and is imported by its own name.

``polyprag.integrations.langchain``, ``polyprag.integrations.llama_index`` and
``polyprag.integrations.datasets``.
"""
