#if canImport(CoreML)

import CoreML
import Foundation

// Core ML may leave gaps between the rows of an array, most of all in what the Neural Engine gives. Nothing here takes an
// array for contiguous: elements are found by strides, and bounds are checked against the bytes that are there.

extension MLMultiArray {
    /// A new float16 array with these elements, in row-major order.
    static func halves(_ values: [Float], shape: [Int]) throws -> MLMultiArray {
        let array = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .float16)
        try array.write(values)
        return array
    }

    /// A new int32 array (T,) of token ids.
    static func tokens(_ ids: [Int]) throws -> MLMultiArray {
        let array = try MLMultiArray(shape: [NSNumber(value: ids.count)], dataType: .int32)
        try array.withUnsafeMutableBytes { (bytes: UnsafeMutableRawBufferPointer, strides: [Int]) -> Void in
            let items = bytes.bindMemory(to: Int32.self)
            let step = strides.first ?? 1
            for (i, id) in ids.enumerated() {
                guard i * step < items.count, let item = Int32(exactly: id) else {
                    throw RWKVError.input("Token \(id) is no token id.")
                }
                items[i * step] = item
            }
        }
        return array
    }

    /// The elements of a float16 or float32 array, in row-major order.
    func floats() throws -> [Float] {
        let rows = Rows(shape: shape.map(\.intValue), strides: strides.map(\.intValue))
        let kind = dataType
        return try withUnsafeBytes { (bytes: UnsafeRawBufferPointer) -> [Float] in
            switch kind {
            case .float16: return try rows.read(bytes.bindMemory(to: UInt16.self), Half.float)
            case .float32: return try rows.read(bytes.bindMemory(to: Float.self)) { $0 }
            default: throw RWKVError.model("Core ML gave an array that is neither float16 nor float32.")
            }
        }
    }

    /// Fill a float16 array with elements in row-major order. What is beyond float16 becomes its largest number: RWKV-4's exponents
    /// begin there.
    func write(_ values: [Float]) throws {
        guard dataType == .float16, values.count == count else {
            throw RWKVError.model("An array of \(count) elements cannot take \(values.count) in float16.")
        }
        let sizes = shape.map(\.intValue)
        try withUnsafeMutableBytes { (bytes: UnsafeMutableRawBufferPointer, strides: [Int]) -> Void in
            let rows = Rows(shape: sizes, strides: strides)
            let items = bytes.bindMemory(to: UInt16.self)
            try rows.check(items.count)
            var next = 0
            rows.forEach { start in
                for i in 0..<rows.length {
                    items[start + i * rows.step] = Half.bits(min(max(values[next], -65504), 65504))
                    next += 1
                }
            }
        }
    }
}

#endif
