import Foundation

/// A safetensors file in memory, as far as states need it.
struct Safetensors {
    struct Tensor: Equatable {
        /// In a state `F32` or `F16`; `I32` and `U8` of what it has besides its tensors.
        let dtype: String
        let shape: [Int]
        /// Little-endian, row-major.
        let data: Data
    }

    var tensors: [String: Tensor]
    var metadata: [String: String]

    init(tensors: [String: Tensor], metadata: [String: String]) {
        self.tensors = tensors
        self.metadata = metadata
    }

    /// Read a file's bytes. Nil if they are no safetensors file.
    init?(_ file: Data) {
        let file = Data(file)  // a slice would begin elsewhere than at 0
        guard file.count >= 8 else { return nil }
        var length: UInt64 = 0
        for (i, byte) in file.prefix(8).enumerated() { length |= UInt64(byte) << UInt64(8 * i) }
        guard length <= 1 << 24, 8 + Int(length) <= file.count else { return nil }
        let start = 8 + Int(length)
        guard let header = (try? JSONSerialization.jsonObject(with: file.subdata(in: 8..<start))) as? [String: Any] else { return nil }
        tensors = [:]
        metadata = header["__metadata__"] as? [String: String] ?? [:]
        for (name, value) in header where name != "__metadata__" {
            guard let about = value as? [String: Any], let dtype = about["dtype"] as? String, let shape = about["shape"] as? [Int],
                let offsets = about["data_offsets"] as? [Int], offsets.count == 2,
                0 <= offsets[0], offsets[0] <= offsets[1], offsets[1] <= file.count - start
            else { return nil }
            let data = file.subdata(in: start + offsets[0]..<start + offsets[1])
            guard let size = ["F32": 4, "F16": 2, "I32": 4, "U8": 1][dtype], Self.count(shape) == data.count / size, data.count % size == 0 else { return nil }
            tensors[name] = Tensor(dtype: dtype, shape: shape, data: data)
        }
    }

    /// The bytes of a file.
    func encoded() throws -> Data {
        var header: [String: Any] = ["__metadata__": metadata]
        var body = Data()
        for (name, tensor) in tensors.sorted(by: { $0.key < $1.key }) {
            let end = body.count + tensor.data.count
            header[name] = ["dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [body.count, end]] as [String: Any]
            body.append(tensor.data)
        }
        var json = try JSONSerialization.data(withJSONObject: header, options: [.sortedKeys])
        json.append(Data(repeating: 0x20, count: (8 - json.count % 8) % 8))
        var file = Data((0..<8).map { UInt8(truncatingIfNeeded: json.count >> (8 * $0)) })
        file.append(json)
        file.append(body)
        return file
    }

    /// How many elements a shape has; nil if that is no number.
    private static func count(_ shape: [Int]) -> Int? {
        var count = 1
        for n in shape {
            let (product, overflow) = count.multipliedReportingOverflow(by: n)
            if n < 0 || overflow { return nil }
            count = product
        }
        return count
    }
}

extension Data {
    /// Whole numbers as int32, little-endian.
    init(ids: [Int]) {
        self = ids.map { Int32(truncatingIfNeeded: $0) }.withUnsafeBytes { Data($0) }
    }

    /// These bytes as int32.
    var ids: [Int] {
        guard count >= 4 else { return [] }
        var values = [Int32](repeating: 0, count: count / 4)
        _ = values.withUnsafeMutableBytes { copyBytes(to: $0) }
        return values.map { Int($0) }
    }

    /// Numbers as little-endian bytes: every Apple device is little-endian.
    init(floats: [Float]) {
        self = floats.withUnsafeBytes { Data($0) }
    }

    /// These bytes as float32.
    var floats: [Float] {
        guard count >= 4 else { return [] }
        var values = [Float](repeating: 0, count: count / 4)
        _ = values.withUnsafeMutableBytes { copyBytes(to: $0) }
        return values
    }

    /// These bytes as float16, widened.
    var halves: [Float] {
        guard count >= 2 else { return [] }
        var bits = [UInt16](repeating: 0, count: count / 2)
        _ = bits.withUnsafeMutableBytes { copyBytes(to: $0) }
        return bits.map { Half.float($0) }
    }
}
