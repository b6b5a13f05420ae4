// Detections of an exported file with onnxruntime alone, in C++17.
//   g++ -std=c++17 -I HEADERS onnx_only.cpp -L LIBRARY -lonnxruntime -o detect
//   ./detect mine.onnx image.ppm
// HEADERS and LIBRARY are the include/ and lib/ of an onnxruntime release. The image is a binary PPM (P6), so that no
// library is needed to read it: `python -c "from PIL import Image; Image.open('a.jpg').convert('RGB').save('a.ppm')"`.
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
    int64_t height = 0, width = 0;
    std::vector<uint8_t> pixels;  // [height width 3], RGB
};

Picture read_ppm(const std::string& file) {
    std::ifstream stream(file, std::ios::binary);
    std::string magic;
    int64_t most = 0;
    Picture picture;
    stream >> magic >> picture.width >> picture.height >> most;
    stream.get();  // the one space before the pixels
    if (!stream || magic != "P6" || most != 255 || picture.width < 1 || picture.height < 1)
        throw std::runtime_error(file + ": no binary PPM of 8 bits");
    picture.pixels.resize(picture.height * picture.width * 3);
    if (!stream.read(reinterpret_cast<char*>(picture.pixels.data()), picture.pixels.size()))
        throw std::runtime_error(file + ": is cut off");
    return picture;
}

int main(int count, char** words) try {
    if (count != 3) throw std::runtime_error("usage: detect FILE.onnx IMAGE.ppm");
    Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "retina");
    Ort::Session session(environment, words[1], Ort::SessionOptions{});
    Picture picture = read_ppm(words[2]);

    // images [B H W 3] at the top left of a common canvas, and the (height, width) of each
    std::array<int64_t, 4> shape{1, picture.height, picture.width, 3};
    std::array<int64_t, 2> sizes{picture.height, picture.width}, sizes_shape{1, 2};
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<Ort::Value> inputs;
    inputs.push_back(Ort::Value::CreateTensor<uint8_t>(memory, picture.pixels.data(), picture.pixels.size(),
                                                       shape.data(), shape.size()));
    inputs.push_back(Ort::Value::CreateTensor<int64_t>(memory, sizes.data(), sizes.size(),
                                                       sizes_shape.data(), sizes_shape.size()));
    const char* names[] = {"images", "sizes"};
    const char* results[] = {"detections", "counts"};
    auto outputs = session.Run(Ort::RunOptions{nullptr}, names, inputs.data(), 2, results, 2);

    // detections [B D 6], best first: x1 y1 x2 y2 in pixels, score, label; the metadata `retina` names the labels
    const float* rows = outputs[0].GetTensorData<float>();
    for (int64_t row = 0; row < outputs[1].GetTensorData<int64_t>()[0]; ++row, rows += 6)
        std::printf("%d %.4f %.2f %.2f %.2f %.2f\n", int(rows[5]), rows[4], rows[0], rows[1], rows[2], rows[3]);
    return 0;
} catch (const std::exception& fault) {
    std::cerr << fault.what() << "\n";
    return 2;
}
