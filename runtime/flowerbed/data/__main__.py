"""Place the data of one machine: `python -m flowerbed.data PLAN OUTPUT`."""

from flowerbed.data.place import main

main()
