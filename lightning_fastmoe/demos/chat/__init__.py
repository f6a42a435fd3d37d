"""Chats for fine-tuning: their answers are learned, several of them share a row."""

from lightning_fastmoe.demos.chat.answers import Example, encode_chat
from lightning_fastmoe.demos.chat.data import ChatFiles
from lightning_fastmoe.demos.chat.packing import pack
from lightning_fastmoe.demos.chat.separation import check_separation

__all__ = ["ChatFiles", "Example", "check_separation", "encode_chat", "pack"]
