"""The rules of torch's CUDA caching allocator (c10/cuda/CUDACachingAllocator.cpp, default settings), without a card.

A request is rounded up to 512 bytes and takes the smallest free block of its pool that is large enough. A block
that is much larger is split. Without such a block a new segment is taken from the card; if the card is full,
segments that are wholly free are given back first, and a segment of which any part is in use is not. Freed
neighbours are merged.
"""
import bisect

MB = 2 ** 20


class OutOfMemory(Exception):
    pass


class Block:
    def __init__(self, size, small, before=None, after=None):
        self.size = size
        self.small = small
        self.before = before             # neighbours within the segment
        self.after = after
        self.free = True


def by_size(block):
    return block.size


class Allocator:
    def __init__(self, capacity):
        self.capacity = capacity         # bytes of the card that this process may use
        self.reserved = 0
        self.allocated = 0
        self.peak = 0
        self.blocks = {True: [], False: []}      # the free ones of the small and the large pool, by size

    def malloc(self, size):
        """A block of at least size bytes. Raises OutOfMemory."""
        size = max(512, -(-int(size) // 512) * 512)
        small = size <= MB
        blocks = self.blocks[small]
        at = bisect.bisect_left(blocks, size, key=by_size)
        block = blocks.pop(at) if at < len(blocks) else self.segment(size, small)

        # Split off what is left, unless it is hardly worth a block.
        rest = block.size - size
        if rest >= 512 if small else rest > MB:
            remainder = Block(rest, small, before=block, after=block.after)
            if block.after:
                block.after.before = remainder
            block.after = remainder
            block.size = size
            self.enter(remainder)
        block.free = False
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)
        return block

    def segment(self, size, small):
        """A new segment from the card, as one block."""
        if small:
            wanted = 2 * MB
        elif size < 10 * MB:
            wanted = 20 * MB
        else:
            wanted = -(-size // (2 * MB)) * 2 * MB
        if self.reserved + wanted > self.capacity:
            self.empty_cache()
        if self.reserved + wanted > self.capacity:
            raise OutOfMemory(f"{size / 1e9:.2f} GB asked, {self.allocated / 1e9:.2f} in use, "
                              f"{(self.reserved - self.allocated) / 1e9:.2f} reserved and free, "
                              f"of {self.capacity / 1e9:.2f}")
        self.reserved += wanted
        return Block(wanted, small)

    def enter(self, block):
        bisect.insort(self.blocks[block.small], block, key=by_size)

    def release(self, block):
        """Free a block and merge it with its free neighbours."""
        self.allocated -= block.size
        block.free = True
        if block.before and block.before.free:
            earlier = block.before
            self.blocks[block.small].remove(earlier)
            earlier.size += block.size
            earlier.after = block.after
            if block.after:
                block.after.before = earlier
            block = earlier
        if block.after and block.after.free:
            later = block.after
            self.blocks[block.small].remove(later)
            block.size += later.size
            block.after = later.after
            if later.after:
                later.after.before = block
        self.enter(block)

    def empty_cache(self):
        """Give wholly free segments back to the card (torch.cuda.empty_cache)."""
        for blocks in self.blocks.values():
            for block in list(blocks):
                if not block.before and not block.after:
                    blocks.remove(block)
                    self.reserved -= block.size

    @property
    def free(self):
        """What mem_get_info calls free."""
        return self.capacity - self.reserved
