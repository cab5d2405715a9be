"""Token ids: the tokenizer's codes first, then the special tokens."""

from dataclasses import dataclass

TABLE_MULTIPLE = 128  # table widths that tensor cores and tensor-parallel degrees divide


@dataclass(frozen=True, slots=True)
class Vocab:
    """Ids of a model that reads `codes` different codes, `codes_per_image` of them an image.

    0 … codes-1   codes, exactly as the tokenizer numbers them
    codes         bos, the first input of a document in layout "bos"
    codes + 1     eos, reserved: it stands in no sentence and never ends generation
    codes + 2     pad, the input after the end of a row; never a label
    """

    codes: int
    codes_per_image: int

    def __post_init__(self) -> None:
        if self.codes < 1 or self.codes_per_image < 1:
            raise ValueError(f"a vocabulary needs at least one code and one code an image: {self}")

    @property
    def bos(self) -> int:
        return self.codes

    @property
    def eos(self) -> int:
        return self.codes + 1

    @property
    def pad(self) -> int:
        return self.codes + 2

    @property
    def size(self) -> int:
        """Width of the embedding table: the next multiple of 128 (8192 codes: 8320)."""
        return -(-(self.pad + 1) // TABLE_MULTIPLE) * TABLE_MULTIPLE
