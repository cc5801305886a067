"""Raw video -> shards: segment -> frames -> landmarks -> raster -> sample -> shard.

Everything here is numpy: pictures are uint8, height x width x 3, RGB.
"""
