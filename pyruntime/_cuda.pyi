class Driver:
    def __init__(self, library: str = "libcuda.so.1") -> None: ...
    def launch(
        self,
        name: str,
        function: int,
        grid_x: int,
        grid_y: int,
        block_x: int,
        block_y: int,
        shared_bytes: int,
        device: int,
        stream: int,
        args: bytes,
    ) -> None: ...
