/// Where the elements of a strided array lie: rows along the last axis.
struct Rows {
    let shape: [Int]
    let strides: [Int]

    /// Elements of a row.
    var length: Int { shape.last ?? 1 }
    /// From an element of a row to the next.
    var step: Int { strides.last ?? 1 }
    /// Rows in all.
    var count: Int { shape.dropLast().reduce(1, *) }

    /// Throw unless every element lies within a buffer of so many.
    func check(_ nItems: Int) throws {
        guard shape.count == strides.count, shape.allSatisfy({ $0 > 0 }), strides.allSatisfy({ $0 >= 0 }) else {
            throw RWKVError.model("Core ML gave an array of shape \(shape) with strides \(strides).")
        }
        let last = zip(shape, strides).reduce(0) { $0 + ($1.0 - 1) * $1.1 }
        guard last < nItems else {
            throw RWKVError.model("Core ML gave an array of shape \(shape) and strides \(strides) in \(nItems) elements.")
        }
    }

    /// The elements in row-major order, each converted.
    ///
    /// Through pointers: an array's `append` and a buffer's checks at every element take as long as the conversion.
    func read<T>(_ items: UnsafeBufferPointer<T>, _ convert: (T) -> Float) throws -> [Float] {
        try check(items.count)
        guard let from = items.baseAddress else { return [] }
        return [Float](unsafeUninitializedCapacity: count * length) { buffer, n in
            guard var to = buffer.baseAddress else { return }
            forEach { start in
                var place = from + start
                var left = length
                while left > 0 {
                    to.initialize(to: convert(place.pointee))
                    to += 1
                    place += step
                    left -= 1
                }
            }
            n = count * length
        }
    }

    /// Call with the place of each row's first element, in row-major order.
    func forEach(_ body: (_ start: Int) -> Void) {
        var index = [Int](repeating: 0, count: max(shape.count - 1, 0))
        var start = 0
        for _ in 0..<count {
            body(start)
            var axis = index.count - 1
            while axis >= 0 {
                index[axis] += 1
                start += strides[axis]
                if index[axis] < shape[axis] { break }
                start -= strides[axis] * shape[axis]
                index[axis] = 0
                axis -= 1
            }
        }
    }
}
