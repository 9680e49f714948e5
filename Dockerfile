# las_mm on a CPU, made by the command that README gives: docker build -t las_mm .
#   docker run -it las_mm                      a shell beside the checkout
#   docker run las_mm make demo                train, evaluate and draw the demo
#   docker run -v $PWD/photos:/photos las_mm las_mm masks ...
FROM python:3.11-slim-bookworm

# A compiler for the native ops; what OpenCV loads; git, which says what a sdist contains.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /las_mm
COPY . .
# Compiles mmcv (12 minutes on 2 cores) unless WHEELS is a folder of the checkout that has its wheel.
ARG WHEELS=
RUN make setup WHEELS=$WHEELS
ENV PATH=/las_mm/.venv/bin:$PATH
CMD ["bash"]
