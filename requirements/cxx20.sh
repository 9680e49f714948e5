#!/bin/sh
# mmcv's sdist asks for C++17, torch 2.14's headers need C++20: the last -std wins.
exec "${LAS_MM_CXX:-g++}" "$@" -std=c++20
